"""What is done with weights files: convert, check, inspect, export. Only the command line imports it."""
