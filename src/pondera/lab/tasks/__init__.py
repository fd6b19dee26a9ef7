"""Tasks that ship with pondera; each is a plain file a user could have written."""
