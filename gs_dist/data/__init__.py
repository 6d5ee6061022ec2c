"""Calibration samples: files and their rows, columns, chats and tokens, cut into samples."""
