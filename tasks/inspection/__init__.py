"""Looking at what a run made: the biography of an image, two label versions side by side, what was chosen of a class.

Nothing here makes an artifact, loads torch or knows the terminal; `flows/inspect_commands.py` prints what it finds.
"""
