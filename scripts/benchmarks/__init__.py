"""What something costs: seconds, memory, programs per second."""
