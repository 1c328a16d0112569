"""Jobs on GPUs rented from Modal."""
