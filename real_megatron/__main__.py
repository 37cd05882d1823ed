"""`python -m real_megatron` and `torchrun -m real_megatron`: the command line."""

from real_megatron.cli import main

if __name__ == "__main__":
    main()
