-- ack_delete.lua: acknowledges entries and deletes them, both or neither.
-- KEYS[1] stream  ARGV[1] group  ARGV[2…] ids
redis.call('XACK', KEYS[1], unpack(ARGV))
return redis.call('XDEL', KEYS[1], unpack(ARGV, 2))
