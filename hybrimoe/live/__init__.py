"""What a running engine is doing, for people who watch: snapshots, how to get at them, how they look in a terminal."""
