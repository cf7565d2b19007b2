"""The commands of `blip-fast`, one file each.

A package adds a command by an entry point of the group `blip_fast.commands` (see pyproject.toml), which names a
`Command`. Command files import nothing heavy at the top: `blip-fast --help` must answer at once.
"""
