"""The protocol on a Slurm cluster: the missing runs as job arrays that wait for each other, and how far they are."""
