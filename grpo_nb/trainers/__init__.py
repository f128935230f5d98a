"""TRL's trainers with the packed step in them; the one floor that patches TRL."""
