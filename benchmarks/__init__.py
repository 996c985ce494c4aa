"""What is measured, each figure with its command: see README.md beside this file."""
