"""The blocks that configs are made of: one frozen dataclass each, the same in every command.

Field descriptions are what `--help` prints. Construction validates and does nothing else.
"""
