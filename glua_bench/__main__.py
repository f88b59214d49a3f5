"""`python -m glua_bench` is the same as `glua-bench`."""

from glua_bench.cli import main

if __name__ == "__main__":
    main()
