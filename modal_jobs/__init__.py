"""Jobs on rented GPUs."""
