"""Parameters in other forms: 8-bit integers, and matrices joined for speed."""
