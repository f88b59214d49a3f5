"""Search over settings of methods, scored without target labels.

The YAML files in this directory are the built-in sweeps; docs/sweeps.md describes their format.
Settings declare their search ranges with `glua_bench.config.setting`.
"""
