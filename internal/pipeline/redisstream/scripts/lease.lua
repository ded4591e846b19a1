-- lease.lua: keeps a member among those of a group, and gives it, leaves it, or takes from it the lease of a stream.
-- KEYS[1] lease, a hash: owner, epoch, until, and one field m:<member> per member with the end of its time
-- ARGV[1] member  ARGV[2] its epoch, 0 when it has none  ARGV[3] milliseconds that lease and membership last
-- ARGV[4] what it wants: keep (renew what it has), take (also take what is free), give (give up the stream),
--         leave (give up the stream and the membership)
-- Returns {owner, epoch, members…}; the owner is empty when the stream is free. Every time here is this server's.
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local owner, epoch, lasts, members = '', '0', 0, {}
local all = redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
  local name, value = all[i], all[i + 1]
  if name == 'owner' then owner = value
  elseif name == 'epoch' then epoch = value
  elseif name == 'until' then lasts = tonumber(value)
  elseif string.sub(name, 1, 2) == 'm:' and name ~= 'm:' .. ARGV[1] then
    if tonumber(value) > now then members[#members + 1] = string.sub(name, 3)
    else redis.call('HDEL', KEYS[1], name) end
  end
end
-- An owner of the member's name and another epoch is its earlier life: names are unique among living members.
local mine = owner == ARGV[1] and epoch == ARGV[2] and lasts > now
if owner ~= '' and not mine and (lasts <= now or owner == ARGV[1]) then owner = '' end
if mine and (ARGV[4] == 'give' or ARGV[4] == 'leave') then owner = '' end
if owner == '' and ARGV[4] == 'take' then
  -- Epochs grow even when Redis has lost the last one.
  local micros = tonumber(time[1]) * 1000000 + tonumber(time[2])
  owner, epoch = ARGV[1], string.format('%.0f', math.max(tonumber(epoch) + 1, micros))
  redis.call('HSET', KEYS[1], 'owner', owner, 'epoch', epoch)
  mine = true
end
if owner == '' then redis.call('HDEL', KEYS[1], 'owner', 'until')
elseif mine then redis.call('HSET', KEYS[1], 'until', now + ARGV[3]) end
if ARGV[4] == 'leave' then redis.call('HDEL', KEYS[1], 'm:' .. ARGV[1])
else
  redis.call('HSET', KEYS[1], 'm:' .. ARGV[1], now + ARGV[3])
  members[#members + 1] = ARGV[1]
end
redis.call('PEXPIRE', KEYS[1], 7 * 24 * 3600 * 1000) -- a group that nobody runs any more leaves nothing behind
return {owner, epoch, unpack(members)}
