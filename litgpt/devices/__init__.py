"""What differs from device to device: kinds of accelerators, precision, memory, random numbers, threads."""
