"""`python -m glua_bench` is the same as `glua-bench`; child processes are started with this file.

Neither imports modules of the current directory: a `yaml.py` in a directory of data is not run.
"""

import sys

if __name__ == "__main__":
    if not getattr(sys.flags, "safe_path", False):  # since Python 3.11
        del sys.path[0]  # the current directory, or that of this file
    from glua_bench.cli import main

    main()
