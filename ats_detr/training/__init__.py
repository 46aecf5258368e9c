"""How the detector learns: losses, teachers, the loop, and what a run leaves on disk."""
