"""Start the stages of mmclip_dist: the quick start, the `deepspeed` command, Ray jobs."""

__version__ = "0.1.0"
