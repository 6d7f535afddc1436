"""What stands between a script and the system: its command line, its end, its files and tasks.

Owns no knowledge of images or models. May import config and the standard library; distributed for a
cluster."""
