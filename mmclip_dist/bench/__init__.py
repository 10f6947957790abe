"""Measurements that users run themselves; committed figures lie in each part's bench/results."""
