"""Searches over settings of methods, by a score that needs no target label.

The YAML files beside this one are the sweeps that come with the package; docs/sweeps.md describes
their form. The range that a search may use stands at each setting: `glua_bench.config.setting`.
"""
