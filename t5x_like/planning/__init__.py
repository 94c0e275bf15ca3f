"""What a training job takes before it runs: programs compiled for devices that are not there, and what they cost."""
