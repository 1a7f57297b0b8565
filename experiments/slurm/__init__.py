"""The protocol on a Slurm cluster: submit missing runs as dependent job arrays, and show their progress."""
