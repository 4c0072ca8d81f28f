"""Several models beside each other, by the evaluations that the store has of them."""
