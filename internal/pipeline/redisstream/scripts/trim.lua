-- trim.lua: deletes what every group of the stream has acknowledged.
-- KEYS[1] stream
-- Returns how many entries were deleted. A group that has read nothing keeps everything.
local function before(a, b) -- ids by value; the parts have up to 20 digits, more than a number of Lua holds
  local ams, aseq = string.match(a, '^(%d+)-(%d+)$')
  local bms, bseq = string.match(b, '^(%d+)-(%d+)$')
  if ams ~= bms then
    if #ams ~= #bms then return #ams < #bms end
    return ams < bms
  end
  if #aseq ~= #bseq then return #aseq < #bseq end
  return aseq < bseq
end
-- The id after one. A sequence too long for a number of Lua stays: one entry more is kept.
local function after(id)
  local ms, seq = string.match(id, '^(%d+)-(%d+)$')
  if #seq > 15 then return id end
  return string.format('%s-%.0f', ms, tonumber(seq) + 1)
end
local first = nil -- the least id that some group may still need
for _, g in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local info = {}
  for i = 1, #g, 2 do info[g[i]] = g[i + 1] end
  local id
  if info.pending > 0 then id = redis.call('XPENDING', KEYS[1], info.name)[2]
  else id = after(info['last-delivered-id']) end
  if not first or before(id, first) then first = id end
end
if not first then return 0 end
-- XTRIM and not XDEL, which would keep Redis from telling the lag.
return redis.call('XTRIM', KEYS[1], 'MINID', '=', first)
