"""What a condition is, and what turns a batch into one."""
