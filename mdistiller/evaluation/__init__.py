"""Looking at trained networks: their quality, their teacher's beside it, features, pictures."""
