"""Systems under measurement: each answers the same requests in a process of its own and reports the same times."""
