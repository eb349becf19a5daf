"""Operations with gradients of their own, and what saves their memory."""
