"""Searches over settings of methods; empty so far.

The place of sweep definitions (YAML files are packaged with this folder) and of what executes
them. The range that a search may use already stands at each setting: `glua_bench.config.setting`.
"""
