"""A data format of your own. In the configuration: `data.train.0.format: format:stars`."""

from collections.abc import Mapping
from typing import Any

from real_megatron.data.formats import BadRecord, Record, register_format


@register_format("stars")
def stars(row: Mapping[str, Any]) -> Record:
    """Rows such as {"question": "…", "answer": "…", "stars": [4, 5], "review": "…"}."""
    missing = [name for name in ("question", "answer", "stars") if not row.get(name)]
    if missing:
        raise BadRecord(f"no {' and no '.join(missing)}; every row needs a question, an answer and stars")
    return Record(
        fields={"prompt": f"Question: {row['question']}\nAnswer: {row['answer']}\nRate the answer from 1 to 5."},
        scores=[float(number) for number in row["stars"]],
        critiques=[row["review"]] if row.get("review") else [],
        meta={"question": row["question"]},
    )
