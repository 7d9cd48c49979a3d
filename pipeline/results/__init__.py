"""Tables, pictures and plans: what a person reads."""
