"""``python -m cn_hf``, also for ``accelerate launch -m cn_hf train ...``: the same as ``cn-hf``."""

from cn_hf.cli import main

if __name__ == "__main__":
    main()
