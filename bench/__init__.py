"""Side-by-side measurements, their recorded results and their plots."""
