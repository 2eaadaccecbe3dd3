"""What comes of a method: accuracy and tokens, on several seeds."""
