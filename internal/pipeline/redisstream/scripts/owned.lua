-- owned.lua: does one thing to a stream, if the caller owns it at that very moment.
-- KEYS[1] stream  KEYS[2] lease (lease.lua)  ARGV[1] owner  ARGV[2] epoch  ARGV[3…] a command of Redis, whole
-- Returns {1, answer}, or {0} when the lease has ended or is another's: nothing was done.
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local l = redis.call('HMGET', KEYS[2], 'owner', 'epoch', 'until')
if l[1] ~= ARGV[1] or l[2] ~= ARGV[2] or tonumber(l[3] or 0) <= now then return {0} end
return {1, redis.call(unpack(ARGV, 3))}
