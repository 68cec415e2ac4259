"""``python -m ksm_ext.cli``: the same as ``ksm``."""

import sys

from ksm_ext.cli.program import main

if __name__ == "__main__":
    sys.exit(main())
