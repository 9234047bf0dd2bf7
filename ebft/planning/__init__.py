"""What a run will take, told before it starts: memory by its parts and stages, time by stage."""
