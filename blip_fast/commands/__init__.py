"""The commands of `blip-fast`, one file each.

A package adds a command by an entry point in the group `blip_fast.commands` (see pyproject.toml) that names a
`Command`. Command files import nothing heavy at the top, since `blip-fast --help` must answer at once.
"""
