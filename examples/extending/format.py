"""A data format of your own. In the configuration: `data.train.0.format: format:stars`."""

from collections.abc import Mapping
from typing import Any

from real_megatron.data.formats import BadRecord, Record, register_format


@register_format("stars")
def stars(record: Mapping[str, Any]) -> Record:
    """Records such as {"question": "…", "answer": "…", "stars": [4, 5], "review": "…"}."""
    missing = [name for name in ("question", "answer", "stars") if not record.get(name)]
    if missing:
        raise BadRecord(f"no {' and no '.join(missing)}; every record needs a question, an answer and stars")
    return Record(
        fields={"prompt": f"Question: {record['question']}\nAnswer: {record['answer']}\nRate the answer from 1 to 5."},
        scores=[float(number) for number in record["stars"]],
        critiques=[record["review"]] if record.get("review") else [],
        meta={"question": record["question"]},
    )
