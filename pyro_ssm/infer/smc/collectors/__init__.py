"""What a particle filter can record along the way, each thing an object."""
