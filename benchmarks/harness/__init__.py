"""Cases, the gate before a time, timing, and the record."""
