"""The PTQ interface of MindSpore Golden Stick, in one process and without Ray."""
