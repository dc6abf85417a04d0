"""What a picture was made from, as a value: kept in its file, written as Python and as a command, and drawn again."""
