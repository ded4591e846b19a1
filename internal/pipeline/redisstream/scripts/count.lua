-- count.lua: counts the entries after an id, as far as a limit.
-- KEYS[1] stream  ARGV[1] id  ARGV[2] limit
return #redis.call('XRANGE', KEYS[1], '(' .. ARGV[1], '+', 'COUNT', ARGV[2])
