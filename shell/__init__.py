"""What stands between a script and the system: its command line, its end, its files and tasks.

Knows nothing of images and models. May import config and the standard library, distributed for a cluster."""
