"""The leak guard: evaluation images that hide among the unlabeled ones, as they are or slightly altered.

`phash` hashes, `hamming` finds near hashes, `alignment` lays one picture over another, `index` puts them together.
"""
