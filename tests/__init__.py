"""Claims about the project, folder by folder as in the tree. Run: `.venv/bin/python -m pytest`."""
